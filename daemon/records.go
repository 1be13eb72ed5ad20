package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// maxRecord bounds one record, in bytes; options are bounded by the request's size.
const maxRecord = 256 << 10

// record is something that outlives the daemon. Its name is that of its file,
// UID-REST.json, the same for what shall replace it; no word of the user's is in it.
type record interface{ name() string }

// records keeps them as files in dir, root's alone.
type records[R record] struct {
	dir       string
	what      string // for people: "session at boot"
	most, own int    // per machine, per user

	mu sync.Mutex
}

func (s *records[R]) file(r R) string { return filepath.Join(s.dir, r.name()) }

func (s *records[R]) save(r R) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding a %s: %w", s.what, err)
	}
	if len(text) > maxRecord {
		return fmt.Errorf("remembering a %s: its options are %d bytes, more than %d", s.what, len(text), maxRecord)
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return fmt.Errorf("making the folder of each %s: %w", s.what, err)
	}
	if _, err := os.Stat(s.file(r)); err != nil {
		user, _, _ := strings.Cut(r.name(), "-")
		all, _ := os.ReadDir(s.dir)
		own := 0
		for _, e := range all {
			if strings.HasPrefix(e.Name(), user+"-") {
				own++
			}
		}
		if len(all) >= s.most || own >= s.own {
			return fmt.Errorf("remembering a %s: %d are the most for one user, %d for this machine", s.what, s.own, s.most)
		}
	}
	if err := writeWhole(s.file(r), append(text, '\n')); err != nil {
		return fmt.Errorf("writing a %s: %w", s.what, err)
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

// remove forgets a record; one that is not there is no error.
func (s *records[R]) remove(r R) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := os.Remove(s.file(r)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forgetting a %s: %w", s.what, err)
	}
	return nil
}

func (s *records[R]) has(r R) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := os.Stat(s.file(r))
	return err == nil
}

// list returns all records; the error joins what was wrong with single ones, which
// stay where they are.
func (s *records[R]) list() (all []R, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	entries, readErr := os.ReadDir(s.dir)
	if errors.Is(readErr, fs.ErrNotExist) {
		return nil, nil
	} else if readErr != nil {
		return nil, fmt.Errorf("reading each %s: %w", s.what, readErr)
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		text, readErr := os.ReadFile(filepath.Join(s.dir, e.Name()))
		var r R
		if readErr == nil {
			dec := json.NewDecoder(bytes.NewReader(text[:min(len(text), maxRecord)]))
			dec.DisallowUnknownFields()
			readErr = dec.Decode(&r)
		}
		if readErr == nil && r.name() != e.Name() {
			readErr = errors.New("its name is not that of its content")
		}
		if readErr != nil {
			err = errors.Join(err, fmt.Errorf("reading %s %s: %w", s.what, e.Name(), readErr))
			continue
		}
		all = append(all, r)
	}
	return all, err
}
