package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/culvert-dev/culvert/daemon/api"
)

// maxKept bounds the sessions with intercepts that are remembered over a crash.
const maxKept = 256

// keptRecord is what outlives the daemon of a session that has intercepts: whose
// it is and how to reach its cluster. What it changed there is in the user's own
// journal, which root does not read.
type keptRecord struct {
	UID     int         `json:"uid"`
	ID      string      `json:"id"` // of the session
	Options api.Options `json:"options"`
	ByRoot  bool        `json:"byRoot,omitempty"`
}

// keptStore keeps the records as files in dir, root's alone.
type keptStore struct {
	dir string
	mu  sync.Mutex
}

func (k *keptStore) path() string { return filepath.Join(k.dir, "intercepts") }

func (k *keptStore) file(id string) string { return filepath.Join(k.path(), id+".json") }

// set keeps, or forgets, that s has intercepts.
func (k *keptStore) set(s *session, keep bool) error {
	if !keep {
		return k.remove(s.id)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	text, err := json.MarshalIndent(keptRecord{UID: s.account.UID, ID: s.id, Options: s.options, ByRoot: s.byRoot}, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding a session with intercepts: %w", err)
	}
	if len(text) > maxRecord {
		return fmt.Errorf("remembering a session with intercepts: its options are %d bytes, more than %d", len(text), maxRecord)
	}
	if err := os.MkdirAll(k.path(), 0o700); err != nil {
		return fmt.Errorf("making the folder of sessions with intercepts: %w", err)
	}
	if there, _ := os.ReadDir(k.path()); len(there) >= maxKept {
		return fmt.Errorf("%d sessions with intercepts are remembered, which is the most", len(there))
	}
	if err := writeWhole(k.file(s.id), append(text, '\n')); err != nil {
		return fmt.Errorf("writing a session with intercepts: %w", err)
	}
	return nil
}

func (k *keptStore) remove(id string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := os.Remove(k.file(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forgetting a session with intercepts: %w", err)
	}
	return nil
}

// has tells whether a session is remembered.
func (k *keptStore) has(id string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	_, err := os.Stat(k.file(id))
	return err == nil
}

// list returns all records; what cannot be read is left where it is and told.
func (k *keptStore) list() (records []keptRecord, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	entries, readErr := os.ReadDir(k.path())
	if errors.Is(readErr, fs.ErrNotExist) {
		return nil, nil
	} else if readErr != nil {
		return nil, fmt.Errorf("reading the sessions with intercepts: %w", readErr)
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		text, readErr := os.ReadFile(k.file(id))
		var r keptRecord
		if readErr == nil {
			readErr = json.Unmarshal(text, &r)
		}
		if readErr == nil && (r.ID != id || r.UID == 0) {
			readErr = errors.New("it is not what its name says")
		}
		if readErr != nil {
			err = errors.Join(err, fmt.Errorf("reading session with intercepts %s: %w", e.Name(), readErr))
			continue
		}
		records = append(records, r)
	}
	return records, err
}

// revert has what dead sessions left in clusters undone: for each record a
// session process runs as its user, until one succeeded or ctx ends.
func (v *supervisor) revert(ctx context.Context) {
	v.running = ctx
	records, err := v.kept.list()
	if err != nil {
		v.log.Error("reading the sessions with intercepts", "error", err)
	}
	for _, r := range records {
		v.wg.Go(func() { v.revertOne(ctx, r) })
	}
}

func (v *supervisor) revertOne(ctx context.Context, r keptRecord) {
	log := v.log.With("uid", r.UID, "session", r.ID)
	for delay := minBootDelay; ctx.Err() == nil; delay = min(2*delay, maxBootDelay) {
		err := v.tryRevert(ctx, r)
		if err == nil {
			log.Info("what the session had left in the cluster was undone")
			if err := v.kept.remove(r.ID); err != nil {
				log.Error("forgetting it", "error", err)
			}
			return
		}
		if ctx.Err() == nil {
			log.Warn("undoing what the session left in the cluster: will try again", "in", delay, "error", err)
			sleep(ctx, delay)
		}
	}
}

// tryRevert runs one process that undoes, and returns nil if it did.
func (v *supervisor) tryRevert(ctx context.Context, r keptRecord) error {
	a, err := lookup(r.UID)
	if err == nil {
		a, err = a.withGroups()
	}
	if err != nil {
		return err
	}
	s, err := v.newSession(a, api.ConnectRequest{Options: r.Options}, bootEnv(a), r.ByRoot, r.ID)
	if err != nil {
		return err
	}
	v.start(s)
	select {
	case <-s.done:
	case <-ctx.Done():
		return ctx.Err() // stop ends it
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.reverted:
		return nil
	case s.err != nil:
		return s.err
	}
	return errors.New("the session process did not say that it was done")
}
