"""The commands that measure: `ff-run bench`, its table and its picture."""
