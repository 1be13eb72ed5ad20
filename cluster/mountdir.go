package cluster

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
)

// mountDir is a directory in which files are written for nobody but the user.
// No name leads out of it: os.Root holds for that, whatever happens in the
// directory meanwhile.
type mountDir struct{ root *os.Root }

func openMountDir(dir string) (*mountDir, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &mountDir{root}, nil
}

func (d *mountDir) Close() error { return d.root.Close() }

// write puts a file in the place of what has that name. Who reads it meanwhile
// sees the old one or the new one.
func (d *mountDir) write(name string, data []byte) error {
	if err := d.directories(path.Dir(name)); err != nil {
		return err
	}
	if info, err := d.root.Lstat(name); err == nil && info.IsDir() {
		return errors.New("there is a directory of that name")
	}
	// In the same directory, so that the rename is one step. A symbolic link at
	// name is replaced itself.
	temporary := path.Join(path.Dir(name), ".culvert-"+rand.Text())
	f, err := d.root.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err == nil {
		err = d.root.Rename(temporary, name)
	}
	if err != nil {
		return errors.Join(err, d.root.Remove(temporary))
	}
	return nil
}

// directories makes those that are missing on the way to name.
func (d *mountDir) directories(name string) error {
	if name == "." {
		return nil
	}
	way := ""
	for part := range strings.SplitSeq(name, "/") {
		way = path.Join(way, part)
		info, err := d.root.Lstat(way)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			if err := d.root.Mkdir(way, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
		case err != nil:
			return err
		case !info.IsDir():
			return fmt.Errorf("%s is in the way and no directory", way)
		}
	}
	return nil
}
