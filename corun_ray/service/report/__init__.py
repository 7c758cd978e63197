"""The HTML page of a run: its template, charts and statistics."""
