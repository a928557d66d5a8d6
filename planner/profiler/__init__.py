"""What one execution of each kernel of a joint graph costs: measured on the device, or estimated from a description."""
