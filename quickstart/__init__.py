"""The whole pipeline on a small model that it trains itself."""
