"""A bundle on its way to the disk: parts, staging, journal, and changes to a published one."""
