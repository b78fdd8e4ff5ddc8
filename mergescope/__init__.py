"""MergeScope: the microscope for model merging."""
