"""Many films, one line of JSON each: read ahead, answered one after the other, resumed where a run ended."""
