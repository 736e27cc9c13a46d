#ifndef STUB_IF_PACKET_H
#define STUB_IF_PACKET_H
#include <linux/types.h>
#endif
