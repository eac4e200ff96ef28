"""Which key blocks a decode step should attend to: the study behind version 2 of decode."""
