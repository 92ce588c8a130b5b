// Checks of Winograd's convolution.
#pragma once

#include <random>

#include "cpu/kernels.h"

// Compares it with a direct convolution in double, and prints a line per failure; returns their number.
int check_winograd(gradprobe::cpu::Isa isa, std::mt19937_64& random);
