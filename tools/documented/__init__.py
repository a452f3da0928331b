"""Every command and every piece of Python that the pages show, run as a reader would: `python -m tools.documented`."""
