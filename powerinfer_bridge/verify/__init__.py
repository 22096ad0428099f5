"""`psp verify`: an exported file against the contract and its model."""
