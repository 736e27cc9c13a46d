#ifndef STUB_ASM_PAGE_H
#define STUB_ASM_PAGE_H
/* The unit in which BCC counts a ring buffer (planner/program.py). The machine's pages may be larger. */
#define PAGE_SHIFT 12
#define PAGE_SIZE (1UL << PAGE_SHIFT)
#endif
