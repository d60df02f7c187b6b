// All kernels: one text for every kind of device.
#define EDGEMOE_DEVICE_TEXT

// clang-format off: each needs those before it
#include "dialect.h"
#include "shapes.h"
#include "functions.h"
#include "products.inl"
#include "elementwise.inl"
#include "attention.inl"
#include "recurrence.inl"
#include "routing.inl"
