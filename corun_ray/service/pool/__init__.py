"""The label pool that all workers share: index, shards, client, keeper and snapshots; looking into a saved one."""
