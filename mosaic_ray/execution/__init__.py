"""Client tasks in this process or on Ray."""
