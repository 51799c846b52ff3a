"""The benchmark suite: one benchmark per case, all peers interleaved in it. See bench/README.md."""
