#ifndef STUB_BPF_COMMON_H
#define STUB_BPF_COMMON_H
#include <linux/types.h>
#endif
