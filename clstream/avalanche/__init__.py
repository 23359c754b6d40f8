"""What both bridges to Avalanche share: how its modules are imported."""
