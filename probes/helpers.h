/*
 * Helpers of the kernel, under names of our own. At each call of one of these by its own name, BCC reads all of the kernel's symbols to
 * see whether the kernel has it: some 40 ms a call, three seconds in all. Every kernel that we load on has them.
 */

static int (*read_user)(void *to, u32 bytes, const void *from) = (void *)BPF_FUNC_probe_read_user;
static int (*read_user_str)(void *to, u32 bytes, const void *from) = (void *)BPF_FUNC_probe_read_user_str;

#define bpf_probe_read_user read_user
#define bpf_probe_read_user_str read_user_str
