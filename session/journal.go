package session

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/culvert-dev/culvert/daemon/api"
)

// journal is a file in the user's state directory that tells what a session has
// changed in its cluster, for the case that session and daemon die at once: the
// daemon's next start has a session of the same id read it.
type journal struct{ path string }

// journalEntry is what the file holds.
type journalEntry struct {
	Session    string  `json:"session"`
	Context    string  `json:"context,omitempty"`
	Agent      string  `json:"agent,omitempty"` // name of its Deployment
	Intercepts []saved `json:"intercepts"`
}

// stateDir is where programs keep what shall survive a restart (XDG Base
// Directory Specification, $XDG_STATE_HOME).
func stateDir() (string, error) {
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "culvert"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", &api.Error{Code: api.CodeInternal, Message: "this user has no home directory to keep a journal in: " + err.Error(), Hint: "set XDG_STATE_HOME"}
	}
	return filepath.Join(home, ".local", "state", "culvert"), nil
}

func (s *Session) journal() journal {
	dir, err := stateDir()
	if err != nil {
		return journal{} // write says so
	}
	return journal{path: filepath.Join(dir, "sessions", s.id+".json")}
}

// writeJournal replaces the journal.
func (s *Session) writeJournal(list []saved) error {
	j := s.journal()
	e := journalEntry{Session: s.id, Agent: s.recall().Agent, Intercepts: list}
	if s.cluster != nil {
		e.Context = s.cluster.Context()
	}
	if err := j.write(e); err != nil {
		return &api.Error{Code: api.CodeInternal, Message: "writing the journal, without which a crash could not be undone: " + err.Error(), Hint: "make " + filepath.Dir(j.path) + " writable, or set XDG_STATE_HOME"}
	}
	return nil
}

func (j journal) write(e journalEntry) error {
	if j.path == "" {
		_, err := stateDir()
		return err
	}
	text, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(j.path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(j.path), ".journal-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), j.path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// read returns what a dead session left; no file is no intercepts.
func (j journal) read() (e journalEntry, err error) {
	text, err := os.ReadFile(j.path)
	if errors.Is(err, fs.ErrNotExist) {
		return e, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &e)
	}
	if err != nil {
		return e, fmt.Errorf("reading the journal: %w", err)
	}
	return e, nil
}

func (j journal) remove() error {
	if j.path == "" {
		return nil
	}
	if err := os.Remove(j.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the journal: %w", err)
	}
	return nil
}
