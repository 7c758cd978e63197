"""The networks: CORUN, its transformer CPMM, and building any restoration network from a description."""
