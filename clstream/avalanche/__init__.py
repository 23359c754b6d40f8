"""What both bridges to Avalanche share."""
