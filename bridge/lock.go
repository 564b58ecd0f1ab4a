// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/gofrs/flock"

	"azurevnet/internal/statefile"
)

// lockWait bounds the wait for the bridge's lock, below any deadline of a call
// that waits for it; lockPoll is how often it is tried meanwhile.
const (
	lockWait = 15 * time.Second
	lockPoll = 3 * time.Millisecond
	lockTurn = 2 * time.Second
)

// lockShared holds the bridge as it stands: for attach and detach. who is
// written into the lock file and named by whoever waits in vain.
func (h *Host) lockShared(ctx context.Context, who string) (unlock func(), err error) {
	return h.lock(ctx, who, (*flock.Flock).TryRLockContext)
}

// lockExclusive holds the bridge alone: for a move, a rebuild, a removal.
func (h *Host) lockExclusive(ctx context.Context, who string) (unlock func(), err error) {
	return h.lock(ctx, who, (*flock.Flock).TryLockContext)
}

// lock waits for the others that came before: whoever waits for bridge.lock holds
// bridge.queue meanwhile, so that one who wants it alone is not passed for ever
// by those who share it. Nor does he keep them for long, though one of them hang:
// after lockTurn he goes to the queue's end. The kernel lets go of a lock with its
// holder's last descriptor, so a dead holder keeps nobody.
func (h *Host) lock(ctx context.Context, who string, try func(*flock.Flock, context.Context, time.Duration) (bool, error)) (func(), error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	path := h.path("bridge.lock")
	var err error
	for err == nil {
		var l *flock.Flock
		if l, err = h.turn(ctx, path, who, try); l != nil {
			// Only words for people: of several shared holders the last one is named.
			_ = os.WriteFile(path, []byte(who+"\n"), 0o600)
			return func() { l.Close() }, nil
		}
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		holder, _ := os.ReadFile(path)
		return nil, fmt.Errorf("lock the bridge for %q: %q holds %s: %w", who, strings.TrimSpace(string(holder)), path, ctx.Err())
	}
	return nil, fmt.Errorf("lock the bridge for %q: %w", who, err)
}

// turn tries to take the lock for one turn at the head of the queue; nil: not yet.
func (h *Host) turn(ctx context.Context, path, who string, try func(*flock.Flock, context.Context, time.Duration) (bool, error)) (*flock.Flock, error) {
	leave, err := statefile.Lock(ctx, h.path("bridge.queue"), who)
	if err != nil {
		return nil, err
	}
	defer leave()
	turn, cancel := context.WithTimeout(ctx, lockTurn)
	defer cancel()
	l := flock.New(path, flock.SetPermissions(0o600))
	_, err = try(l, turn, lockPoll)
	if err == nil && lies(l) {
		return l, nil
	}
	l.Close()
	if errors.Is(err, context.DeadlineExceeded) {
		err = ctx.Err()
	}
	return nil, err
}

// lies says that the locked file is the one that others will open, and not one
// that an uninstall deleted meanwhile.
func lies(l *flock.Flock) bool {
	mine, err := l.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(l.Path())
	return err == nil && os.SameFile(mine, there)
}
