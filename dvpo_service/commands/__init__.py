"""What each ``dvpo`` command does. These modules alone, with tune_sweeps, know the actors."""
