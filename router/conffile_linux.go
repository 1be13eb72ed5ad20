package router

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

const (
	// mark begins the file while it is ours.
	mark = "# culvertd owns this file while a cluster is connected"

	// absent is the target of the saved link when there was no file.
	absent = "(there was no file)"

	// before begins the lines of our file that keep the original's nameservers,
	// for a restore without the saved file.
	before = "# before: "
)

// confFile is /etc/resolv.conf and the place where its original is kept: a copy
// of a file, or a symbolic link with the original's target. The original is
// always saved before the file becomes ours and removed after it is back, so a
// crash at any point leaves enough to restore. Not for concurrent use.
type confFile struct {
	path  string
	saved string
}

// isOurs tells whether the content is of our making.
func isOurs(content []byte) bool { return bytes.HasPrefix(content, []byte(mark)) }

// read returns the content; a missing file is empty.
func (f confFile) read() ([]byte, error) {
	b, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

// machine returns the content that is the machine's own, now or before us.
func (f confFile) machine() []byte {
	b, err := f.read()
	if err == nil && isOurs(b) {
		return f.original()
	}
	return b
}

// original reads the saved file, or what the saved link leads to now.
func (f confFile) original() []byte {
	if target, err := os.Readlink(f.saved); err == nil {
		if target == absent {
			return nil
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(f.path), target)
		}
		b, _ := os.ReadFile(target) // dangling: nobody answers for the machine
		return b
	}
	b, err := os.ReadFile(f.saved)
	if err != nil {
		b, _ = f.read()
		return reconstruct(b)
	}
	return b
}

// reconstruct makes an original of our own file, when the saved one is lost.
func reconstruct(ours []byte) []byte {
	var b bytes.Buffer
	for line := range strings.Lines(string(ours)) {
		if rest, ok := strings.CutPrefix(line, before); ok {
			b.WriteString(rest)
		}
	}
	return b.Bytes()
}

// save keeps the file as it is now as the original.
func (f confFile) save() error {
	if err := os.MkdirAll(filepath.Dir(f.saved), 0o755); err != nil {
		return fmt.Errorf("making the directory for the original of %s: %w", f.path, err)
	}
	tmp := f.saved + ".new"
	_ = os.Remove(tmp) // of a crash
	info, err := os.Lstat(f.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = os.Symlink(absent, tmp)
	case err != nil:
	case info.Mode()&fs.ModeSymlink != 0:
		var target string
		if target, err = os.Readlink(f.path); err == nil {
			err = os.Symlink(target, tmp)
		}
	default:
		var b []byte
		if b, err = os.ReadFile(f.path); err == nil {
			err = writeNew(tmp, b, info)
		}
	}
	if err == nil {
		err = os.Rename(tmp, f.saved)
	}
	if err != nil {
		return fmt.Errorf("saving %s: %w", f.path, err)
	}
	return syncDir(filepath.Dir(f.saved))
}

// write makes the content the file's, in the place of a symbolic link too.
func (f confFile) write(content []byte) error {
	var like fs.FileInfo
	if info, err := os.Lstat(f.path); err == nil && info.Mode().IsRegular() {
		like = info
	}
	return f.replace(content, like)
}

// tmp is where the next file is written; one name, so that a crash leaves one at most.
func (f confFile) tmp() string {
	return filepath.Join(filepath.Dir(f.path), ".resolv.conf.culvert")
}

// replaceTries bounds how often a new file is written that somebody takes away.
const replaceTries = 50

// replace swaps the file atomically where that is possible, with like's mode and owner.
func (f confFile) replace(content []byte, like fs.FileInfo) error {
	var err error
	for range replaceTries {
		if err = writeNew(f.tmp(), content, like); err == nil {
			if err = os.Rename(f.tmp(), f.path); err == nil {
				return syncDir(filepath.Dir(f.path))
			}
			_ = os.Remove(f.tmp())
		}
		// Of another daemon, which shares the folder but not the file (containers with a
		// bind-mounted one each): it took the new file for what a crash left.
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) {
			break
		}
	}
	// A bind-mounted file (containers) cannot be renamed over: EBUSY. A read-only
	// /etc with a writable file in it gives EROFS already for the new file. What a
	// link leads to is another program's file, and restoring replaces the link.
	inPlace := errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EXDEV)
	if info, e := os.Lstat(f.path); !inPlace || e != nil || !info.Mode().IsRegular() {
		return fmt.Errorf("replacing %s: %w", f.path, err)
	}
	if err := writeInPlace(f.path, content); err != nil {
		return fmt.Errorf("writing %s: %w", f.path, err)
	}
	return nil
}

// writeInPlace never leaves the file empty: it cuts the rest after the new content is there.
func writeInPlace(path string, content []byte) error {
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = w.WriteAt(content, 0)
	if err == nil {
		err = w.Truncate(int64(len(content)))
	}
	return errors.Join(err, w.Sync(), w.Close())
}

// writeNew writes a file that is on the disk when it returns.
func writeNew(path string, content []byte, like fs.FileInfo) error {
	_ = os.Remove(path) // of a crash; never write through a link that somebody put there
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = w.Write(content)
	mode := fs.FileMode(0o644) // every program must read it, whatever our umask is
	if like != nil {
		mode = like.Mode().Perm()
		if st, ok := like.Sys().(*syscall.Stat_t); ok {
			err = errors.Join(err, w.Chown(int(st.Uid), int(st.Gid)))
		}
	}
	return errors.Join(err, w.Chmod(mode), w.Sync(), w.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) {
		return err // EINVAL: a filesystem without
	}
	return nil
}

// leftover tells whether there is anything for restore to do.
func (f confFile) leftover() bool {
	b, err := f.read()
	if err == nil && isOurs(b) {
		return true
	}
	for _, path := range []string{f.saved, f.tmp()} {
		if _, err := os.Lstat(path); err == nil {
			return true
		}
	}
	return false
}

// restore puts the original back if the file is still ours, and tells whether
// it was. A file that somebody else wrote meanwhile stays.
func (f confFile) restore() (restored bool, err error) {
	_ = os.Remove(f.tmp())
	b, err := f.read()
	if err != nil {
		return false, fmt.Errorf("reading %s: %w", f.path, err)
	}
	if isOurs(b) {
		if err := f.putBack(b); err != nil {
			return false, fmt.Errorf("restoring %s: %w", f.path, err)
		}
		restored = true
	}
	if err := os.Remove(f.saved); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return restored, fmt.Errorf("removing the saved %s: %w", f.path, err)
	}
	return restored, nil
}

func (f confFile) putBack(ours []byte) error {
	target, err := os.Readlink(f.saved)
	switch {
	case err == nil && target == absent:
		if err := os.Remove(f.path); !errors.Is(err, syscall.EBUSY) {
			return err
		}
		return writeInPlace(f.path, nil)
	case err == nil:
		if err := os.Symlink(target, f.tmp()); noRoom(err) {
			// No names for a moment are better than dead ones for good.
			if err := os.Remove(f.path); err != nil {
				return err
			}
			return os.Symlink(target, f.path)
		} else if err != nil {
			return err
		}
		if err := os.Rename(f.tmp(), f.path); err != nil {
			_ = os.Remove(f.tmp())
			return err
		}
		return syncDir(filepath.Dir(f.path))
	}
	info, err := os.Lstat(f.saved)
	var content []byte
	switch {
	case errors.Is(err, fs.ErrNotExist):
		content, info = reconstruct(ours), nil
	case err != nil:
		return err
	default:
		if content, err = os.ReadFile(f.saved); err != nil {
			return err
		}
	}
	err = f.replace(content, info)
	if noRoom(err) {
		// A full disk has room for the original where our longer text is.
		return writeInPlace(f.path, content)
	}
	return err
}

// noRoom tells that a disk is full, or a user's or group's share of it.
func noRoom(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// parsedConf is what matters to us of a resolv.conf(5).
type parsedConf struct {
	servers []netip.Addr // without our own
	search  []string
	other   []string // lines that are kept as they are: options, sortlist
}

func parseResolvConf(content []byte) parsedConf {
	var c parsedConf
	for line := range strings.Lines(string(content)) {
		line = strings.TrimSpace(line)
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(fields[1]); err == nil && !loopbacks.Contains(a) {
				c.servers = append(c.servers, a)
			}
		case "search", "domain":
			c.search = fields[1:] // the last one counts
		case "options", "sortlist":
			c.other = append(c.other, line)
		}
	}
	return c
}
