"""A cluster on one machine: hosts in network namespaces, cables of a known rate, one JAX process per host."""
