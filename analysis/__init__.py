"""Put prediction and measurement side by side: compare them, calibrate the one by the other, report both."""
