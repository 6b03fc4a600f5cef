"""The tests are about the CPU, where results are exact: hide a GPU before torch is imported."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
