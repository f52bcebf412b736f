"""Views of a run: the terminal view of `watch` and the HTML report. Own no state."""
