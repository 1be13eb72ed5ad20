package cluster

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
)

// Environ is the environment of one container of a workload, as the kubelet
// makes it. It is not safe for concurrent use.
type Environ struct {
	Namespace string
	Workload  string // for people: "Deployment demo/web"
	Pod       string // which the values are of; empty: no pod runs, and they are the template's
	Container string
	Vars      []Var
	Notes     []string // what is not as in the pod, and why

	cluster   *Cluster
	pod       *corev1.Pod // made of the template where none runs
	container *corev1.Container
	values    map[string]string // of Vars, by name

	configMaps map[string]*corev1.ConfigMap // nil: there is none of that name
	secrets    map[string]*corev1.Secret
	node       *corev1.Node
}

// Var is one variable.
type Var struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	// Source is where it comes from, for people: "ConfigMap web", "Secret db",
	// "Service redis"; empty: the container's own definition.
	Source string `json:"source,omitempty"`
}

// ServiceLink says whether the variable is one of those that Kubernetes adds for
// the Service of that name.
func (v Var) ServiceLink(service string) bool { return v.Source == "Service "+service }

// Environ resolves the environment of a container of target (KIND/NAME or NAME)
// as the kubelet does: envFrom, over it env with $(VAR) expanded, and below both
// the Services of the namespace. Values of a running pod of the target are taken
// where there is one. An empty container is the only one, or the one that the pod
// names as its default. What is marked optional and does not exist is left out.
// Errors are *api.Error.
func (c *Cluster) Environ(ctx context.Context, namespace, target, container string) (*Environ, error) {
	w, err := c.findWorkload(ctx, namespace, target)
	if err != nil {
		return nil, err
	}
	pod, err := c.bestPod(ctx, w)
	if err != nil {
		return nil, err
	}
	e := &Environ{
		Namespace: w.namespace, Workload: w.String(), cluster: c,
		configMaps: map[string]*corev1.ConfigMap{}, secrets: map[string]*corev1.Secret{},
	}
	switch {
	case pod != nil:
		e.Pod, e.pod = pod.Name, pod
	case w.template == nil:
		return nil, &api.Error{
			Code:    api.CodeNotFound,
			Message: fmt.Sprintf("%s has no pod whose environment it could be", w),
			Hint:    "name the workload: deployment/NAME, statefulset/NAME, ...",
		}
	default:
		e.pod = &corev1.Pod{ObjectMeta: *w.template.ObjectMeta.DeepCopy(), Spec: *w.template.Spec.DeepCopy()}
		e.pod.Namespace = w.namespace
		if e.pod.Spec.ServiceAccountName == "" {
			e.pod.Spec.ServiceAccountName = "default" // as admission sets it
		}
		e.note("no pod of %s runs: the values are those of its template, without what only a pod has", w)
	}
	if e.container, err = chooseContainer(e.pod, container, w.String()); err != nil {
		return nil, err
	}
	e.Container = e.container.Name
	if err := e.resolve(ctx); err != nil {
		return nil, err
	}
	return e, nil
}

func (e *Environ) note(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); !slices.Contains(e.Notes, text) {
		e.Notes = append(e.Notes, text)
	}
}

// chooseContainer finds the container of that name, init containers included, or
// the one that is meant without a name.
func chooseContainer(pod *corev1.Pod, name, of string) (*corev1.Container, error) {
	var names []string
	for i := range pod.Spec.Containers {
		names = append(names, pod.Spec.Containers[i].Name)
	}
	asked := name != ""
	if !asked && len(names) == 1 {
		name = names[0]
	}
	if !asked && name == "" {
		name = pod.Annotations[defaultContainer]
	}
	all := append(slices.Clone(pod.Spec.Containers), pod.Spec.InitContainers...)
	if i := slices.IndexFunc(all, func(c corev1.Container) bool { return c.Name == name }); i >= 0 {
		return &all[i], nil
	}
	for _, c := range pod.Spec.InitContainers {
		names = append(names, c.Name)
	}
	if asked {
		return nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("%s has no container %q", of, name), Hint: "it has " + list(names)}
	}
	return nil, &api.Error{
		Code:    api.CodeUsage,
		Message: fmt.Sprintf("%s has several containers and names none of them as its default", of),
		Hint:    "use --container with one of " + list(names),
	}
}

// resolve makes Vars. The order is the one in which things are declared, with
// the Services last; the kubelet's own is random but for what counts: which value
// wins, and what $(VAR) sees.
func (e *Environ) resolve(ctx context.Context) error {
	links, err := e.serviceLinks(ctx)
	if err != nil {
		return err
	}
	linked := map[string]string{}
	for _, v := range links {
		linked[v.Name] = v.Value
	}
	e.values = map[string]string{}
	at := map[string]int{}
	set := func(v Var) {
		i, ok := at[v.Name]
		if !ok {
			i, at[v.Name] = len(e.Vars), len(e.Vars)
			e.Vars = append(e.Vars, v)
		}
		e.Vars[i], e.values[v.Name] = v, v.Value
	}
	for _, from := range e.container.EnvFrom {
		vars, err := e.from(ctx, from)
		if err != nil {
			return err
		}
		for _, v := range vars {
			set(v)
		}
	}
	// What was set earlier is seen before the Services' variables are.
	lookup := func(name string) (string, bool) {
		if v, ok := e.values[name]; ok {
			return v, true
		}
		v, ok := linked[name]
		return v, ok
	}
	for _, env := range e.container.Env {
		v := Var{Name: env.Name}
		switch {
		case env.Value != "":
			v.Value = expand(env.Value, lookup)
		case env.ValueFrom != nil:
			found := false
			if v, found, err = e.valueFrom(ctx, env); err != nil {
				return err
			}
			if !found {
				continue
			}
		}
		set(v)
	}
	for _, v := range links {
		if _, ok := e.values[v.Name]; !ok {
			set(v)
		}
	}
	return nil
}

// from is all of a ConfigMap or Secret, by key.
func (e *Environ) from(ctx context.Context, from corev1.EnvFromSource) ([]Var, error) {
	data, source := map[string]string{}, ""
	switch {
	case from.ConfigMapRef != nil:
		ref := from.ConfigMapRef
		source = "ConfigMap " + ref.Name
		m, err := e.configMap(ctx, ref.Name, ref.Optional)
		if err != nil {
			return nil, err
		}
		if m != nil {
			data = m.Data
		}
	case from.SecretRef != nil:
		ref := from.SecretRef
		source = "Secret " + ref.Name
		s, err := e.secret(ctx, ref.Name, ref.Optional)
		if err != nil {
			return nil, err
		}
		if s != nil {
			for k, v := range s.Data {
				data[k] = string(v)
			}
		}
	}
	vars := make([]Var, 0, len(data))
	for _, k := range slices.Sorted(maps.Keys(data)) {
		vars = append(vars, Var{Name: from.Prefix + k, Value: data[k], Source: source})
	}
	return vars, nil
}

// valueFrom is a variable that refers to something. It is not found if what is
// optional is missing, or if it cannot be known from here, which is noted.
func (e *Environ) valueFrom(ctx context.Context, env corev1.EnvVar) (v Var, found bool, err error) {
	v.Name = env.Name
	from := env.ValueFrom
	missing := func(kind, name, key string, optional *bool) (Var, bool, error) {
		if isTrue(optional) {
			return v, false, nil
		}
		return v, false, &api.Error{
			Code:    api.CodeNotFound,
			Message: fmt.Sprintf("variable %s of %s: %s %s/%s has no key %q", env.Name, e.Workload, kind, e.Namespace, name, key),
		}
	}
	switch {
	case from.ConfigMapKeyRef != nil:
		ref := from.ConfigMapKeyRef
		v.Source = "ConfigMap " + ref.Name
		m, err := e.configMap(ctx, ref.Name, ref.Optional)
		if err != nil || m == nil {
			return v, false, err
		}
		if v.Value, found = m.Data[ref.Key]; !found {
			return missing("ConfigMap", ref.Name, ref.Key, ref.Optional)
		}
	case from.SecretKeyRef != nil:
		ref := from.SecretKeyRef
		v.Source = "Secret " + ref.Name
		s, err := e.secret(ctx, ref.Name, ref.Optional)
		if err != nil || s == nil {
			return v, false, err
		}
		b, ok := s.Data[ref.Key]
		if !ok {
			return missing("Secret", ref.Name, ref.Key, ref.Optional)
		}
		v.Value = string(b)
	case from.FieldRef != nil:
		v.Source = "pod's " + from.FieldRef.FieldPath
		v.Value, err = e.field(from.FieldRef.FieldPath)
	case from.ResourceFieldRef != nil:
		v.Source = "container's " + from.ResourceFieldRef.Resource
		v.Value, err = e.resource(ctx, from.ResourceFieldRef)
	default:
		err = fmt.Errorf("it comes from a file in the pod, or from something that this version of culvert does not know")
	}
	if err != nil {
		e.note("variable %s is left out: %v", env.Name, err)
		return v, false, nil
	}
	return v, true, nil
}

// configMap reads one, once. It is nil if it does not exist and is optional.
func (e *Environ) configMap(ctx context.Context, name string, optional *bool) (*corev1.ConfigMap, error) {
	m, known := e.configMaps[name]
	if !known {
		var err error
		m, err = e.cluster.client.ConfigMaps(e.Namespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			m = nil
		} else if err != nil {
			return nil, translate(fmt.Sprintf("get configmaps %q in namespace %q", name, e.Namespace), err)
		}
		e.configMaps[name] = m
	}
	if m == nil && !isTrue(optional) {
		return nil, e.absent("ConfigMap", name)
	}
	return m, nil
}

// secret is the same for Secrets.
func (e *Environ) secret(ctx context.Context, name string, optional *bool) (*corev1.Secret, error) {
	s, known := e.secrets[name]
	if !known {
		var err error
		s, err = e.cluster.client.Secrets(e.Namespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			s = nil
		} else if err != nil {
			return nil, translate(fmt.Sprintf("get secrets %q in namespace %q", name, e.Namespace), err)
		}
		e.secrets[name] = s
	}
	if s == nil && !isTrue(optional) {
		return nil, e.absent("Secret", name)
	}
	return s, nil
}

func (e *Environ) absent(kind, name string) error {
	return &api.Error{
		Code:    api.CodeNotFound,
		Message: fmt.Sprintf("%s needs %s %s/%s, which does not exist", e.Workload, kind, e.Namespace, name),
		Hint:    fmt.Sprintf("`kubectl -n %s get %s` shows what there is", e.Namespace, strings.ToLower(kind)),
	}
}

func isTrue(b *bool) bool { return b != nil && *b }

// serviceLinks are the variables that Kubernetes adds for Services with an
// address: those of the namespace, unless the pod does not want them, and the API
// server's.
func (e *Environ) serviceLinks(ctx context.Context) ([]Var, error) {
	byName := map[string]*corev1.Service{}
	if s, err := e.cluster.client.Services(metav1.NamespaceDefault).Get(ctx, "kubernetes", metav1.GetOptions{}); err == nil {
		byName[s.Name] = s
	} // not everybody may see it, and nobody misses it outside of a pod
	if on := e.pod.Spec.EnableServiceLinks; on == nil || *on {
		options := metav1.ListOptions{Limit: pageSize}
		for {
			page, err := e.cluster.client.Services(e.Namespace).List(ctx, options)
			if apierrors.IsForbidden(err) {
				e.note("the variables of Services (NAME_SERVICE_HOST and so on) are left out: you may not list services in namespace %q", e.Namespace)
				break
			}
			if err != nil {
				return nil, translate("listing the Services of namespace "+e.Namespace, err)
			}
			for i := range page.Items {
				byName[page.Items[i].Name] = &page.Items[i]
			}
			if options.Continue = page.Continue; options.Continue == "" {
				break
			}
		}
	}
	var vars []Var
	for _, s := range byName {
		vars = append(vars, linkVars(s)...)
	}
	slices.SortFunc(vars, func(a, b Var) int { return cmp.Compare(a.Name, b.Name) })
	return vars, nil
}

// linkVars are the variables of one Service, as in the kubelet's envvars.
func linkVars(s *corev1.Service) []Var {
	ip := s.Spec.ClusterIP
	if ip == "" || ip == corev1.ClusterIPNone || len(s.Spec.Ports) == 0 {
		return nil
	}
	prefix := linkName(s.Name)
	var vars []Var
	add := func(name, format string, args ...any) {
		vars = append(vars, Var{Name: prefix + name, Value: fmt.Sprintf(format, args...), Source: "Service " + s.Name})
	}
	add("_SERVICE_HOST", "%s", ip)
	add("_SERVICE_PORT", "%d", s.Spec.Ports[0].Port)
	for i, p := range s.Spec.Ports {
		if p.Name != "" {
			add("_SERVICE_PORT_"+linkName(p.Name), "%d", p.Port)
		}
		protocol := strings.ToLower(firstOf(string(p.Protocol), "tcp"))
		url := fmt.Sprintf("%s://%s", protocol, joinHostPort(ip, p.Port))
		if i == 0 {
			add("_PORT", "%s", url)
		}
		of := fmt.Sprintf("_PORT_%d_%s", p.Port, strings.ToUpper(protocol))
		add(of, "%s", url)
		add(of+"_PROTO", "%s", protocol)
		add(of+"_PORT", "%d", p.Port)
		add(of+"_ADDR", "%s", ip)
	}
	return vars
}

func linkName(s string) string { return strings.ToUpper(strings.ReplaceAll(s, "-", "_")) }
