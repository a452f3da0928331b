"""The commands of `ff-run` and their flags."""
