"""The commands of `ff-export` and their flags."""
