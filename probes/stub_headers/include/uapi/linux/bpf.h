#ifndef STUB_BPF_H
#define STUB_BPF_H
#include <linux/types.h>
#endif
