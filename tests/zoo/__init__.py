"""The model zoo: small models of every kind that people train, each planned, trained and compared bit for bit."""
