package cluster

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/culvert-dev/culvert/daemon/api"
)

// payload is a volume's files by their paths in it, with slashes.
type payload map[string][]byte

// WriteMounts writes the ConfigMaps, Secrets and downward API files that the
// container mounts below dir, at the paths that they have in the container, and
// returns those of the files, absolute, in order. It makes dir if there is none.
// Files have mode 0600 and are replaced atomically, directories that it makes
// have 0700; symbolic links are not followed. Volumes of other kinds are noted.
// Errors are *api.Error; what was written before one stays.
func (e *Environ) WriteMounts(ctx context.Context, dir string) (written []string, err error) {
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("the directory of the mounts, %q: %w", dir, err)
	}
	mounts := slices.Clone(e.container.VolumeMounts)
	// One that is mounted inside of another lies over it.
	slices.SortStableFunc(mounts, func(a, b corev1.VolumeMount) int { return cmp.Compare(a.MountPath, b.MountPath) })
	files := payload{}
	for _, m := range mounts {
		if err := e.mount(ctx, m, files); err != nil {
			return nil, err
		}
	}
	d, err := openMountDir(dir)
	if err != nil {
		return nil, mountError(dir, err)
	}
	defer d.Close()
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := d.write(name, files[name]); err != nil {
			return written, mountError(filepath.Join(dir, name), err)
		}
		written = append(written, filepath.Join(dir, filepath.FromSlash(name)))
	}
	return written, nil
}

func mountError(name string, err error) error {
	return &api.Error{Code: api.CodeInternal, Message: fmt.Sprintf("writing the mounted file %s: %v", name, err), Hint: "--mounts DIR names another directory"}
}

// mount adds the files of a mount to files, by their paths in the container
// without the slash before them.
func (e *Environ) mount(ctx context.Context, m corev1.VolumeMount, files payload) error {
	i := slices.IndexFunc(e.pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name })
	if i < 0 {
		e.note("nothing is written for %s: volume %s is not in the template", m.MountPath, m.Name)
		return nil
	}
	volume, kind, err := e.volume(ctx, &e.pod.Spec.Volumes[i])
	if err != nil {
		return err
	}
	if volume == nil {
		e.note("nothing is written for %s: volume %s is %s", m.MountPath, m.Name, kind)
		return nil
	}
	sub := m.SubPath
	if m.SubPathExpr != "" {
		sub = expand(m.SubPathExpr, func(name string) (string, bool) { v, ok := e.values[name]; return v, ok })
	}
	base, err := localPath(m.MountPath)
	if err != nil {
		return err
	}
	for name, data := range volume {
		switch rest, below := strings.CutPrefix(name, strings.Trim(sub, "/")+"/"); {
		case sub == "":
		case name == path.Clean(sub):
			name = "" // the file is the mount
		case below:
			name = rest
		default:
			continue
		}
		if name != "" && !filepath.IsLocal(filepath.FromSlash(name)) {
			return &api.Error{Code: api.CodeInternal, Message: fmt.Sprintf("volume %s has a file %q, which would lie outside of %s", m.Name, name, m.MountPath)}
		}
		files[path.Join(base, name)] = data
	}
	return nil
}

// localPath is a path of the container as one below a directory of ours.
func localPath(p string) (string, error) {
	local := strings.TrimPrefix(path.Clean("/"+filepath.ToSlash(p)), "/")
	if local == "" || !filepath.IsLocal(filepath.FromSlash(local)) {
		return "", &api.Error{Code: api.CodeUnsupported, Message: fmt.Sprintf("a volume mounted at %q cannot be written below a directory", p)}
	}
	return local, nil
}

// volume is what a volume holds; nil, and what it is, if that is not for files of
// ours.
func (e *Environ) volume(ctx context.Context, v *corev1.Volume) (payload, string, error) {
	switch {
	case v.ConfigMap != nil:
		files, err := e.configMapFiles(ctx, v.ConfigMap.Name, v.ConfigMap.Items, v.ConfigMap.Optional)
		return files, "", err
	case v.Secret != nil:
		files, err := e.secretFiles(ctx, v.Secret.SecretName, v.Secret.Items, v.Secret.Optional)
		return files, "", err
	case v.DownwardAPI != nil:
		return e.downwardFiles(ctx, v.DownwardAPI.Items), "", nil
	case v.Projected != nil:
		files, err := e.projectedFiles(ctx, v)
		return files, "", err
	case v.EmptyDir != nil:
		return nil, "an emptyDir", nil
	case v.PersistentVolumeClaim != nil:
		return nil, "of PersistentVolumeClaim " + v.PersistentVolumeClaim.ClaimName, nil
	case v.HostPath != nil:
		return nil, "a directory of the node", nil
	}
	return nil, "neither ConfigMap nor Secret", nil
}

func (e *Environ) configMapFiles(ctx context.Context, name string, items []corev1.KeyToPath, optional *bool) (payload, error) {
	m, err := e.configMap(ctx, name, optional)
	if err != nil || m == nil {
		return payload{}, err
	}
	all := payload{}
	for k, v := range m.Data {
		all[k] = []byte(v)
	}
	maps.Copy(all, m.BinaryData)
	return e.items("ConfigMap", name, all, items, optional)
}

func (e *Environ) secretFiles(ctx context.Context, name string, items []corev1.KeyToPath, optional *bool) (payload, error) {
	s, err := e.secret(ctx, name, optional)
	if err != nil || s == nil {
		return payload{}, err
	}
	return e.items("Secret", name, payload(s.Data), items, optional)
}

// items are the chosen keys at their paths; without a choice all keys.
func (e *Environ) items(kind, name string, all payload, items []corev1.KeyToPath, optional *bool) (payload, error) {
	if len(items) == 0 {
		return all, nil
	}
	chosen := payload{}
	for _, item := range items {
		data, ok := all[item.Key]
		switch {
		case ok:
			chosen[item.Path] = data
		case !isTrue(optional):
			return nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("a volume of %s wants key %q of %s %s/%s, which has none", e.Workload, item.Key, kind, e.Namespace, name)}
		}
	}
	return chosen, nil
}

// downwardFiles leaves out and notes what is not known from here.
func (e *Environ) downwardFiles(ctx context.Context, items []corev1.DownwardAPIVolumeFile) payload {
	files := payload{}
	for _, item := range items {
		var value string
		var err error
		switch {
		case item.FieldRef != nil:
			value, err = e.field(item.FieldRef.FieldPath)
		case item.ResourceFieldRef != nil:
			value, err = e.resource(ctx, item.ResourceFieldRef)
		}
		if err != nil {
			e.note("file %s is left out: %v", item.Path, err)
			continue
		}
		files[path.Clean(item.Path)] = []byte(value)
	}
	return files
}

// projectedFiles are those of all sources, later ones over earlier.
func (e *Environ) projectedFiles(ctx context.Context, v *corev1.Volume) (payload, error) {
	files := payload{}
	for _, source := range v.Projected.Sources {
		var part payload
		var err error
		switch {
		case source.ConfigMap != nil:
			part, err = e.configMapFiles(ctx, source.ConfigMap.Name, source.ConfigMap.Items, source.ConfigMap.Optional)
		case source.Secret != nil:
			part, err = e.secretFiles(ctx, source.Secret.Name, source.Secret.Items, source.Secret.Optional)
		case source.DownwardAPI != nil:
			part = e.downwardFiles(ctx, source.DownwardAPI.Items)
		case source.ServiceAccountToken != nil:
			// It would make this machine the pod, for the API server.
			e.note("the token of ServiceAccount %s (volume %s) is not written", firstOf(e.pod.Spec.ServiceAccountName, "default"), v.Name)
		default:
			e.note("a part of volume %s is not written: it is neither ConfigMap nor Secret nor downward API", v.Name)
		}
		if err != nil {
			return nil, err
		}
		maps.Copy(files, part)
	}
	return files, nil
}
