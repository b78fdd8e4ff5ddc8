"""The dashboard's shell, widgets, jobs and exports."""
