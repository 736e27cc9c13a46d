/* Everything specific to x86-64: registers, system calls and struct epoll_event. arm64.h says the same of arm64. For the arguments
 * of functions BCC has PT_REGS_PARM1… */

/* arch/x86/include/uapi/asm/ptrace.h: the registers that a handler gets, and those of a system call. */
struct pt_regs {
    unsigned long r15, r14, r13, r12, bp, bx;
    unsigned long r11, r10, r9, r8, ax, cx, dx, si, di;
    unsigned long orig_ax, ip, cs, flags, sp, ss;
};

#define SYS_read 0
#define SYS_write 1
#define SYS_close 3
#define SYS_fstat 5
#define SYS_ioctl 16
#define SYS_readv 19
#define SYS_writev 20
#define SYS_sendfile 40
#define SYS_socket 41
#define SYS_connect 42
#define SYS_accept 43
#define SYS_sendto 44
#define SYS_recvfrom 45
#define SYS_sendmsg 46
#define SYS_recvmsg 47
#define SYS_shutdown 48
#define SYS_getsockname 51
#define SYS_setsockopt 54
#define SYS_getsockopt 55
#define SYS_clone 56
#define SYS_fork 57
#define SYS_epoll_wait 232
#define SYS_epoll_ctl 233
#define SYS_newfstatat 262
#define SYS_epoll_pwait 281
#define SYS_accept4 288

/* The number and the arguments of a system call: the part of pt_regs from r10 on, so that one read gets all. */
struct syscall_entry {
    unsigned long argument4;  /* r10 */
    unsigned long argument6;
    unsigned long argument5;
    unsigned long result;
    unsigned long cx;
    unsigned long argument3;
    unsigned long argument2;
    unsigned long argument1;
    unsigned long number;     /* orig_rax */
};

static __always_inline bool read_entry(struct syscall_entry *entry, const struct pt_regs *regs)
{
    return bpf_probe_read_kernel(entry, sizeof(*entry), &regs->r10) == 0;
}

/* struct epoll_event is packed here, as it is for 32 bits. */
struct event {
    u32 events;
    u64 data;
} __attribute__((packed));
