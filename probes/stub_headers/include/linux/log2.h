#ifndef STUB_LOG2_H
#define STUB_LOG2_H
#include <linux/types.h>
#endif
