"""Speed, measured side by side in one run. No test asserts a time; these print them."""
