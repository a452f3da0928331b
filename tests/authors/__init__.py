"""Beside the authors' own code: `make test-authors`, in an environment of its own, never a part of CI.

Their packages come from the package index, their repositories from GitHub; nothing of theirs is kept here. A test whose
package or repository is absent is skipped and says how to get it.
"""
