"""The label pool that all workers share: index, shards, client, keeper, snapshots."""
