/* How long a worker did not come back to epoll_wait(). Meanwhile it served no other connection. */

/* Notes a turn that took long. `last_event_ns`: its end, as in count_turn(). */
static __always_inline void note_turn(struct caller *caller, u32 tgid, u64 last_event_ns)
{
    u64 began_ns = caller->turn_began_ns;
    if (!began_ns || last_event_ns < began_ns + LONG_TURN_NS)
        return;
    struct process *process = processes.lookup(&tgid);
    if (!process)
        return;
    struct turn *turn = &process->long_turns[process->long_turns_count++ & (LONG_TURNS - 1)];
    turn->began_ns = began_ns;
    turn->ended_ns = last_event_ns;
}

#if !DETAIL_REQUEST
/* Returns how much of a turn was within a time. */
static __always_inline u64 shared_ns(u64 turn_began_ns, u64 turn_ended_ns, u64 start_ns, u64 end_ns)
{
    u64 from = GREATER(turn_began_ns, start_ns), to = LESS(turn_ended_ns, end_ns);
    return to > from ? to - from : 0;
}

/* Returns the longest part of a turn within a request. 0: it is less than LONG_TURN_NS. `now`: the worker's present turn lasts. */
static __always_inline u64 longest_turn_ns(struct process *process, const struct request_record *record, u64 now)
{
    u64 start_ns = record->first_read_ns ? record->first_read_ns : record->created_ns;
    u64 end_ns = record->ends_with_write && record->last_write_ns ? record->last_write_ns : record->ended_ns;
    u64 longest_ns = process->turn_began_ns ? shared_ns(process->turn_began_ns, now, start_ns, end_ns) : 0;
    u64 last = (process->long_turns_count - 1) & (LONG_TURNS - 1);
    if (process->long_turns[last].ended_ns > start_ns) {
        for (u32 i = 0; i < LONG_TURNS; i++) {
            struct turn *turn = &process->long_turns[i];
            u64 ns = shared_ns(turn->began_ns, turn->ended_ns, start_ns, end_ns);
            longest_ns = GREATER(longest_ns, ns);
        }
    }
    return longest_ns < LONG_TURN_NS ? 0 : longest_ns;
}
#endif
