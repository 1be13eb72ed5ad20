package daemon

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
)

// A session at boot is tried again after minBootDelay, doubled up to
// maxBootDelay: the network, the user's home or the VPN may not be there yet.
const (
	minBootDelay = time.Second
	maxBootDelay = time.Minute
	maxRecord    = 256 << 10 // bytes; options are bounded by the request's size
	maxRecords   = 256       // per machine
	maxOwn       = 16        // per user, so that one leaves room for the others
)

// bootRecord is what is kept of a session that shall be connected at boot: no
// environment and no credential.
type bootRecord struct {
	UID     int         `json:"uid"`
	Options api.Options `json:"options"`
	// ByRoot: root asked for it, for whomever. Else the user must still be in the
	// group when the machine boots.
	ByRoot bool `json:"byRoot,omitempty"`
}

// name identifies what is connected to, so that connecting again replaces the
// record. No word of the user's is in a file's name.
func (r bootRecord) name() string {
	sum := sha256.Sum256([]byte(r.Options.Kubeconfig + "\x00" + r.Options.Context + "\x00" + r.Options.Namespace))
	return fmt.Sprintf("%d-%x.json", r.UID, sum[:8])
}

// bootStore keeps records as files in dir, root's alone.
type bootStore struct {
	dir string
	mu  sync.Mutex
}

func (b *bootStore) path() string { return filepath.Join(b.dir, "boot") }

func (b *bootStore) save(r bootRecord) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding a session for the next boot: %w", err)
	}
	if len(text) > maxRecord {
		return fmt.Errorf("remembering a session for the next boot: its options are %d bytes, more than %d", len(text), maxRecord)
	}
	if err := os.MkdirAll(b.path(), 0o700); err != nil {
		return fmt.Errorf("making the folder of sessions at boot: %w", err)
	}
	file := filepath.Join(b.path(), r.name())
	if _, err := os.Stat(file); err != nil {
		all, _ := os.ReadDir(b.path())
		own := 0
		for _, e := range all {
			if strings.HasPrefix(e.Name(), fmt.Sprintf("%d-", r.UID)) {
				own++
			}
		}
		if len(all) >= maxRecords || own >= maxOwn {
			return fmt.Errorf("%d sessions at boot are the most for one user, %d for this machine", maxOwn, maxRecords)
		}
	}
	if err := writeWhole(file, append(text, '\n')); err != nil {
		return fmt.Errorf("writing a session for the next boot: %w", err)
	}
	return nil
}

// writeWhole makes a file that is there whole or not at all, after a power loss too.
func writeWhole(file string, text []byte) error {
	tmp := file + ".new"
	w, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = w.Write(text)
	if err = errors.Join(err, w.Sync(), w.Close()); err == nil {
		err = os.Rename(tmp, file)
	}
	if err != nil {
		os.Remove(tmp)
	}
	return err
}

func (b *bootStore) remove(r bootRecord) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := os.Remove(filepath.Join(b.path(), r.name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forgetting a session at boot: %w", err)
	}
	return nil
}

func (b *bootStore) has(r bootRecord) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, err := os.Stat(filepath.Join(b.path(), r.name()))
	return err == nil
}

// list returns all records; the error joins what was wrong with single ones.
func (b *bootStore) list() (records []bootRecord, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	entries, readErr := os.ReadDir(b.path())
	if errors.Is(readErr, fs.ErrNotExist) {
		return nil, nil
	} else if readErr != nil {
		return nil, fmt.Errorf("reading the sessions at boot: %w", readErr)
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		text, readErr := os.ReadFile(filepath.Join(b.path(), e.Name()))
		var r bootRecord
		if readErr == nil {
			dec := json.NewDecoder(bytes.NewReader(text[:min(len(text), maxRecord)]))
			dec.DisallowUnknownFields()
			readErr = dec.Decode(&r)
		}
		if readErr == nil && r.name() != e.Name() {
			readErr = errors.New("its name is not that of its content")
		}
		if readErr != nil {
			err = errors.Join(err, fmt.Errorf("reading session at boot %s: %w", e.Name(), readErr))
			continue
		}
		records = append(records, r)
	}
	return records, err
}

// resume connects the sessions that shall be there at boot, each until it was
// connected once, its record is removed, or ctx ends.
func (v *supervisor) resume(ctx context.Context) {
	records, err := v.boot.list()
	if err != nil {
		v.log.Error("reading the sessions at boot", "error", err)
	}
	for _, r := range records {
		v.wg.Go(func() { v.resumeOne(ctx, r) })
	}
}

func (v *supervisor) resumeOne(ctx context.Context, r bootRecord) {
	log := v.log.With("uid", r.UID, "context", r.Options.Context)
	for delay := minBootDelay; ctx.Err() == nil && v.boot.has(r); delay = min(2*delay, maxBootDelay) {
		err := v.connectAtBoot(ctx, r)
		if err == nil {
			return
		}
		log.Warn("connecting at boot: will try again", "in", delay, "error", err)
		sleep(ctx, delay)
	}
}

// connectAtBoot returns nil once the session is connected.
func (v *supervisor) connectAtBoot(ctx context.Context, r bootRecord) error {
	a, err := lookup(r.UID)
	if err == nil {
		a, err = a.withGroups()
	}
	if err != nil {
		return err
	}
	if !r.ByRoot && !(caller{GID: a.GID, Groups: a.Groups}).in(v.gid) {
		return &api.Error{Code: api.CodeDenied, Message: fmt.Sprintf("uid %d is no longer in the group that may use culvertd", r.UID)}
	}
	s, err := v.newSession(a, api.ConnectRequest{Options: r.Options, AtBoot: true}, bootEnv(a), r.ByRoot, "")
	if err != nil {
		return err
	}
	w := v.watch(func(e *api.Session) bool { return e.ID == s.id })
	defer v.unwatch(w)
	v.start(s)
	for {
		events := w.next(ctx)
		if events == nil {
			return ctx.Err()
		}
		for _, e := range events {
			switch {
			case e.State == api.Connected:
				return nil
			case e.State == api.Disconnected && e.Error != nil:
				return e.Error
			case e.State == api.Disconnected:
				return errors.New("disconnected")
			}
		}
	}
}

// forgetBoot removes the records that a caller's disconnect means.
func (v *supervisor) forgetBoot(c caller, match func(bootRecord) bool) (removed int) {
	records, _ := v.boot.list()
	for _, r := range records {
		if !c.mayUse(r.UID) || !match(r) {
			continue
		}
		if err := v.boot.remove(r); err != nil {
			v.log.Error("forgetting a session at boot", "error", err)
			continue
		}
		removed++
	}
	return removed
}
