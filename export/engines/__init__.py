"""What runs or compiles a segment on the export side, one module a target."""
