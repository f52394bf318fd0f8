"""What happens before Dynamo traces: known reference functions become one node of the graph.

scope         is the frame that Dynamo traces right now compiled by our backend, and with which options?
fingerprint   what a Python function means: pure or not, and its shape without names
library       the families whose functions are known, and the experiment that tells whether one belongs
install       find such functions, substitute them while we compile, undo it
"""
