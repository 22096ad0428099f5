"""What predictors do, in tables and plots."""
