"""How long communication takes: groups of devices on a network, collective algorithms."""
