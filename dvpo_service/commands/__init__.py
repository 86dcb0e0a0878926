"""The ``dvpo`` commands, one module each. Only these modules and tune_sweeps import the actors."""
