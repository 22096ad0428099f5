"""Training of predictors."""
