"""The bundled suites and pools: seeded generators, and the programs that train and write them."""
