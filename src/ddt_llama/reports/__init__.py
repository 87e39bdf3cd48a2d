"""Turns files of a run or a demonstration into plots and self-contained pages; reads files only."""
